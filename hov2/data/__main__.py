from hov2.check import main

if __name__ == "__main__":  # not in the processes that it starts
    main()
