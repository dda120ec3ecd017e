"""What every trainer needs, once: optimizer, states, precision, progress, trackers, signals."""
