"""A model of the reserve, and the checker that explores all of its states."""
