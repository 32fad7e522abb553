"""How well each method learns at each size: JACTUS and its peers on the same data."""
