"""The engine: sequences, the step scheduler, and the runners that compute or simulate a step."""
