"""What lies in a checkpoint's folder, full model or adapter, and how it is read; where folders come from."""
