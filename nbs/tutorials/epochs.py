"Importing this shows fastai's table of the epochs as one output, without progress bars, as a page needs it; for the tutorials, not part of the package"
import time
import pandas as pd
from fastai.callback.progress import ProgressCallback
from fastai.imports import noop
from IPython.display import HTML, display

def start_table(self):
    self.rows,self.old_logger = [],self.logger
    if self.logger!=noop: self.learn.logger = self.add_row

def start_epoch(self): self.started = time.perf_counter()

def add_row(self, log): self.rows.append([*log[:-1], round(time.perf_counter()-self.started, 1)])

def end_table(self):
    self.learn.logger,names = self.old_logger,[*self.recorder.metric_names[:-1], 'seconds']
    if self.rows: display(HTML(pd.DataFrame(self.rows, columns=names).drop(columns='train_loss').round(3).to_html(index=False, border=0)))

for name,f in dict(before_fit=start_table, before_epoch=start_epoch, add_row=add_row, after_fit=end_table, before_train=noop,
    before_validate=noop, after_train=noop, after_validate=noop, after_batch=noop).items(): setattr(ProgressCallback, name, f)
