"""Training runs on real ratings: does the loss help sparse domains, and at what price?"""
