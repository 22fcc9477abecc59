"""The package's models as other libraries have theirs."""
