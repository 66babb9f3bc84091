"""Types that every other part shares. Imports the standard library and numpy only."""
