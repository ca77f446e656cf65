"""Learning that goes on: streams of tasks, how a learner is put through them, and what it kept."""
