"""What the network is for besides classification: segmentation and detection, with what they need beyond its layers."""
