"""OptInter: for every pair of fields a gate chooses whether to memorise, factorise or leave out their interaction."""
