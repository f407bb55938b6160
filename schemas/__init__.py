"""Every message, topic and table of the system; imports nothing of ours."""
