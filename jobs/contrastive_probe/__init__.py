"""What the features of the job contrastive are worth: a linear layer on top of them."""
