"""OptFS: a gate on every feature value decides which values, and so which interactions, a click model keeps."""
