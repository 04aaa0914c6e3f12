"""The second training stage's system scored again, on what the first stage left: `renew()` in renew.py."""
