"""Makes the embedded model, which the package has as files."""
