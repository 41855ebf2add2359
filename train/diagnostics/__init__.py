"""What is watched while a stage trains: alarms, speed, profiles, and losses that are not finite."""
