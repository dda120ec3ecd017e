"""The parts that all trainers share: optimizer, states, precision, progress, trackers, signals."""
