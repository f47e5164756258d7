"""What did a job use? Samplers, the recording session, and the report made from them."""
