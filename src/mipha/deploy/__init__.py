"""From a checkpoint to others' hands: whether it loads without us and where, and the card that says what it is."""
