"""What a MODEL -> MODEL node installs."""
