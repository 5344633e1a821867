"""Features of digits, learned without their labels."""
