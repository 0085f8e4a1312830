import errno, os
odd = [n for n in os.listdir(b".") if n not in
       (b"loop", b"absolute", b"fifo", b"s", b"unreadable", b"closed", b"check.py")]
for name in odd:
    content = open(name, "rb").read()
    assert content == name, (name, content)
    with open(name, "ab") as file:
        file.write(b" changed")
try:
    open("loop")
    outcome = "was opened"
except OSError as error:
    outcome = "is " + errno.errorcode[error.errno]
assert os.readlink("absolute") == "/etc/passwd"
print(len(odd), "odd names, loop", outcome)
