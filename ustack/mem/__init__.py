"""Who may use packet memory when it is short."""
