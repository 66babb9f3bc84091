"""Models that think before they answer: telling one from the other, and limits on it."""
