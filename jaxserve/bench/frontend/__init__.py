"""What a front end costs: many streams from an engine that emits at a steady pace."""
