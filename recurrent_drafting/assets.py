ASSETS={}
def is_asset(n): return False
def model_directory(n): raise KeyError
def asset_fingerprint(d): return None
