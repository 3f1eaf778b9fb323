"""report.html"""
def write_report(folder):
    return folder.path / "report.html"
