"""What every room may use: text, files, progress, noise."""
