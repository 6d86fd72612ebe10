"""Real swap over ustack: laboratories that make it, break what it hangs on, verify every page, and clean up."""
