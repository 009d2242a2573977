"""The parameters of requests: an allow-list of OpenAI's and of vLLM's, with types and bounds, and what they need."""
