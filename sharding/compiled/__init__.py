"""What compiled programs hold, communicate and take, on machines that are here or not."""
