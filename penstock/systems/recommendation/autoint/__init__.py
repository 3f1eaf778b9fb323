"""AutoInt: fields attend to each other, so that stacked layers build combinations of features."""
