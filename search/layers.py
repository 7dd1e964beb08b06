from keras.layers import BatchNormalization, Dropout

__all__ = ["BatchNormalization", "Dropout"]
