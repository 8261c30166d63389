"""The thinker, and what is computed with it: encodings, log-probs of a group, rollouts."""
