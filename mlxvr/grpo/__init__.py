"""Fine-tuning with group-relative rewards: rollouts, loss, adapters and the trainer."""
