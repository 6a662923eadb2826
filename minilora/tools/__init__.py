"""What stands around training: plan, chat, inspect, predict, score, sweep, split."""
