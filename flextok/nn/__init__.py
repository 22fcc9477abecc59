"""Building blocks shared by every model: attention, transformer blocks, embeddings, patches."""
