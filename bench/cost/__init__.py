"""What JACTUS costs: time, memory and size, as ratios to what one would use instead."""
