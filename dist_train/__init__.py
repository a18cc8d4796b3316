"""The trainer: AlexNet-class image classifiers at ImageNet scale, as the 2012 paper describes."""
