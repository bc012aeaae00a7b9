"""What happens when: sessions, encoding, decoding, push mode, repair, tuning."""
