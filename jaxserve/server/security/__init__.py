"""Who may call, and how much they may ask for."""
