"""The training data: knows records, not weights.

record -> Sample -> token ids, labels, images -> rows -> batch
"""
