"""The toy world of emoji: how far generated scenes show their prompts."""
