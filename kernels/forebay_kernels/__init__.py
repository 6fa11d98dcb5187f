"""Operations on tensors that the engine computes with. Knows nothing of requests or sequences."""
