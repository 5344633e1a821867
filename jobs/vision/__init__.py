"""What several jobs about pictures share: the task of classifying, of finding boxes, a trunk, and pictures for people."""
