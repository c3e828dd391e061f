"""Teacher, student, and what is captured from them."""
