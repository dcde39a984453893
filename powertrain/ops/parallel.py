import threading
from concurrent.futures import ThreadPoolExecutor
import torch
_pool={}
def pool(n):
    if n not in _pool:
        b=threading.Barrier(n+1)
        p=ThreadPoolExecutor(n)
        def init():
            torch.get_num_threads(); torch.set_num_threads(1); b.wait()
        fs=[p.submit(init) for _ in range(n)]
        b.wait()
        torch.set_num_threads(n)
        _pool[n]=p
    return _pool[n]
def for_each(f, items):
    n=torch.get_num_threads()
    items=list(items)
    if n==1 or len(items)<n:
        for i in items: f(i)
        return
    it=iter(items); lock=threading.Lock()
    def work():
        with torch.inference_mode():
            while True:
                with lock: i=next(it,None)
                if i is None: return
                f(i)
    for x in [pool(n).submit(work) for _ in range(n)]: x.result()
