"""The round loop, who trains where, how data is split, and the folder that a run leaves."""
