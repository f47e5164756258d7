"""What will a job need? Pure functions over sizes; nothing is allocated here."""
