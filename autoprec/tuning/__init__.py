"""The stages in order, and the commands about plans."""
