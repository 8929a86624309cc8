"""What strategies learn while they serve: who may teach them, how much, and where what they learned is kept."""
