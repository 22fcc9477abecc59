"""The data of emoji, which comes with the package: its data sets, their captions, and how far
generated scenes show their prompts."""
