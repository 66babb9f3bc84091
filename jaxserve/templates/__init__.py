"""Chat templates as programs of somebody else: run in processes of their own, within a budget."""
